"""Image sheets and pages."""
