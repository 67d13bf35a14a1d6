"""What is done with pixels: decode, crop, resize, AutoAugment, views."""
