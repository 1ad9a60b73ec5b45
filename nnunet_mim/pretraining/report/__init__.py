"""What a run says about itself: tables, pictures, one page."""
