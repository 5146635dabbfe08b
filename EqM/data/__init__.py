"""Bytes to tensors and back: files, clips, latents, autoencoders."""
