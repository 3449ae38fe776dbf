"""Images at the ends of networks: uint8 to a first convolution, and a network's output to VGG's input."""
