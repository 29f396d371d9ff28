"""Named sizes of everything: TINY for tests, BUILTIN256 for what ships, FFHQ512 for the published networks."""

from talk3d.models.avatar import AvatarConfig
from talk3d.models.conditioning import ConditioningConfig
from talk3d.models.deltaplane import DeltaplaneConfig
from talk3d.models.encoder import EncoderConfig
from talk3d.models.generator import GeneratorConfig
from talk3d.models.renderer import RendererConfig
from talk3d.models.superresolution import SuperresolutionConfig

TINY = GeneratorConfig(
    z_dim=8,
    c_dim=0,
    mapping_layers=0,
    channel_base=256,
    channel_max=16,
    renderer=RendererConfig(
        w_dim=16,
        plane_channels=4,
        plane_resolution=32,
        decoder_hidden=8,
        feature_channels=8,
        neural_rendering_resolution=16,
        depth_resolution=6,
        depth_resolution_importance=6,
        superresolution=SuperresolutionConfig(input_side=16, channels=(8, 8), matte=True),
    ),
)

TINY_ENCODER = EncoderConfig(side=32, width=4)

TINY_AVATAR = AvatarConfig(
    conditioning=ConditioningConfig(token_width=16),
    deltaplane=DeltaplaneConfig(plane_channels=4, plane_resolution=32, widths=(8, 8, 16), head_width=8, token_width=16, num_bases=5, num_near=13),
)

BUILTIN256 = GeneratorConfig(
    z_dim=256,
    c_dim=0,
    mapping_layers=0,
    channel_base=8192,
    channel_max=320,
    renderer=RendererConfig(
        w_dim=384,
        plane_channels=24,
        plane_resolution=128,
        decoder_hidden=32,
        feature_channels=32,
        neural_rendering_resolution=64,
        ray_start=2.4,
        depth_resolution=16,
        depth_resolution_importance=16,
        superresolution=SuperresolutionConfig(input_side=128, channels=(32, 16), up=(False, True), matte=True),
    ),
)

FFHQ512 = GeneratorConfig()
