"""The latents stage, between the data and what trains on it: a VAE's latents in place of pixels."""
