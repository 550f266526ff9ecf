"""What a classifier has learned to see, and what teaching it costs."""
