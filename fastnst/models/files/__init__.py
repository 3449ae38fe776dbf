"""Files of models: download, checks before anything is loaded, safetensors."""
