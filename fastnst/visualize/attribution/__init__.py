"""Which pixels and images a map or class responds to."""
