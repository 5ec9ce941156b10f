"""Images: files, PIL, arrays and tensors. `files` opens and saves, `convert` converts to and from tensors."""
