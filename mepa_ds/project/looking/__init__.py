"""What is known before anything is chosen: of the images, and of the machine."""
