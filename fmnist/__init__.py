"""Fashion-MNIST, classified by softmax regression trained through softxent's fused op."""
