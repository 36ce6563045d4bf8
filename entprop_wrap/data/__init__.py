"""Images and labels before the step."""
