"""What is known of bundles, for people: one HTML file, the same as JSON, and a card inside each bundle."""
