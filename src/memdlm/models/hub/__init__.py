"""From a name or a folder to a model and a tokenizer: published names, layouts, devices, loading."""
