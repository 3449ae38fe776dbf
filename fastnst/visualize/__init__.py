"""What the networks see: projections back to pixels, saliency, occlusion, and how they are drawn."""
