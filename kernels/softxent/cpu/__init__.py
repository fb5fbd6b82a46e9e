"""The same operations in torch operations: what a CPU tensor gets, and any other device without kernels."""
