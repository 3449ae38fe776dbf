"""What the kernel tests share."""
