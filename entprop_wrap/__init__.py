"""EntProp for any PyTorch image classifier: train for accuracy and robustness, get your own model back."""
