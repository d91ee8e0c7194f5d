"""What a saved Core ML program computes, evaluated from its files alone, without Apple's runtime."""
