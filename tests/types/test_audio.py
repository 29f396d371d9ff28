import torch

from talk3d.types import AudioFeatures, Waveform


def test_duration_is_samples_over_rate() -> None:
    assert Waveform(samples=torch.zeros(8000), sample_rate_hz=16000).duration_s == 0.5


def test_windows_repeat_the_ends_and_centre_the_frame() -> None:
    values = torch.arange(10.0)[:, None, None]  # t f w
    features = AudioFeatures(values=values, fps=25.0, source="test")
    windows = features.around(torch.tensor([0, 5, 9]), context=4)
    assert windows[..., 0, 0].tolist() == [[0, 0, 0, 1], [3, 4, 5, 6], [7, 8, 9, 9]]


def test_sound_is_cut_with_silence_where_there_is_none():
    ramp = Waveform(samples=torch.arange(10.0), sample_rate_hz=10)
    assert ramp.cut(0.2, 0.5).samples.tolist() == [2, 3, 4, 5, 6]
    assert ramp.cut(-0.2, 0.5).samples.tolist() == [0, 0, 0, 1, 2]
    assert ramp.cut(0.8, 0.5).samples.tolist() == [8, 9, 0, 0, 0]
    assert ramp.cut(-3, 0.5).samples.tolist() == [0] * 5
    assert ramp.cut(3, 0.5).samples.tolist() == [0] * 5
