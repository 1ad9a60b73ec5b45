"""Pages and figures: drawing only, nothing of the rest of the package."""
