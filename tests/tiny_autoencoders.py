"""A random autoencoder of each class that --vae takes, as small as its class can be: made in milliseconds."""

import torch

CONFIGS = {
    "AutoencoderKL": {  # as SD3's and FLUX's: 16 channels, a shift, no convolutions round the latents
        "block_out_channels": (8, 8, 8), "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 16, "norm_num_groups": 4, "scaling_factor": 0.5,
        "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1), "scaling_factor": 0.7,
    },
    "AutoencoderDC": {
        "latent_channels": 8, "attention_head_dim": 4, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)), "scaling_factor": 0.4,
    },
    "AutoencoderKLWan": {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "AutoencoderKLCogVideoX": {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4),
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "scaling_factor": 0.8,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2,
    },
}  # fmt: skip
IMAGE_KINDS = [kind for kind in CONFIGS if kind in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")]
CLIP_KINDS = [kind for kind in CONFIGS if kind not in IMAGE_KINDS]


def build(kind, **more):
    """The network, of the same random weights each time. more: of its config."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(diffusers, kind)(**{**CONFIGS[kind], **more}).eval()
        if kind == "AutoencoderKLLTXVideo":  # which are trained, and lie among the weights
            network.latents_mean.normal_()
            network.latents_std.uniform_(0.5, 2)
    return network
