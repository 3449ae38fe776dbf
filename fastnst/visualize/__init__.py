"""Visualizations: projections back to pixels, saliency, occlusion, and the sheets that show them."""
