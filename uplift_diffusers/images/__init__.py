"""Images: files, PIL, arrays and tensors. `files` opens and saves, `convert` makes tensors and back."""
