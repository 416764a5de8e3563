"""Programs: what engines do to models and guides before they run them."""
