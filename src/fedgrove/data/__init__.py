"""Private text: files to records to texts to windows of tokens. Nothing here leaves the client that calls it."""
