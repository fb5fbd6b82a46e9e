"""The Triton kernels and the few lines that launch them. Imported on first use, since Triton may be missing."""
