"""Training images: `manifest` checks, `sampler` orders, `loaders` load, `cache` decodes them once."""
