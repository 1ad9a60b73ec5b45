"""The demonstration: made-up bodies, and a page of pictures of what the method does with them."""
