"""Max pooling that records its switches, and unpooling."""
