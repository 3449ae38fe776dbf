"""The transform net, which is trained, and VGG19, the frozen loss network φ."""
