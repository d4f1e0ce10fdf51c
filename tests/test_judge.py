"""The judge: which answers count, and that the shipped ones read rendered clips."""

from pathlib import Path

import pytest
import torch

import common
from world import shapes
from world.judge import Judge, JudgeConfig
from world.shapes import FACTORS, Clip

WEIGHTS = Path(__file__).parent.parent / "weights"


@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_shapes_and_repeatability(kind):
    judge = Judge(JudgeConfig(kind, 8)).eval()
    video = torch.randn(3, 3, 16, 64, 64)
    logits = judge(video)
    assert {f: logits[f].shape for f in FACTORS} == {f: (3, len(v)) for f, v in FACTORS.items()}
    assert judge.features(video).shape == (3, 64) and judge.read(video).shape == (3, len(FACTORS))
    torch.testing.assert_close(judge(video[1:2])["object"], logits["object"][1:2], atol=1e-4, rtol=1e-4)


def test_loss_leaves_out_what_cannot_be_seen():
    judge = Judge(JudgeConfig(width=8)).eval()  # in training, batch normalisation lets one clip depend on the other
    video = torch.randn(2, 3, 16, 64, 64)
    truth = torch.tensor([[0] * len(FACTORS), [-1] * len(FACTORS)])
    truth[:, 4] = -1  # seen in no clip of the batch
    loss = judge.loss(video, truth)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in judge.parameters())
    torch.testing.assert_close(loss, judge.loss(video[:1], truth[:1]), atol=1e-4, rtol=1e-4)
    assert judge.answer[4].weight.grad.abs().max() == 0


class Knows(Judge):
    """Reads one fixed truth off every clip, with the given certainty."""

    def __init__(self, clip, sure):
        super().__init__(JudgeConfig(width=8))
        self.right, self.sure = clip.truth(), sure

    def forward(self, video):
        out = {}
        for (name, values), right in zip(FACTORS.items(), self.right):
            p = torch.full((len(video), len(values)), (1 - self.sure) / (len(values) - 1))
            p[:, max(right, 0)] = self.sure
            out[name] = p.log()
        return out


def test_probabilities_and_score_are_of_what_the_prompt_names():
    clip = Clip.make(0, 0, look="plain", scene="night", object="star", colour="red", relation=None)
    judge, video = Knows(clip, 0.7), torch.zeros(3, 3, 16, 64, 64)
    prompts = ["a red star", "a red ring at night", ""]
    agreement = (judge.probabilities(video) * judge.direction(prompts)).sum(1)
    torch.testing.assert_close(agreement, torch.tensor([0.7, (0.7 + 0.3 / 7 + 0.7) / 3, 0.0]))
    torch.testing.assert_close(judge.score(video, prompts), torch.tensor([1.0, 2 / 3, 0.0]))


def test_probabilities_have_a_gradient():
    video = torch.randn(1, 3, 16, 64, 64, requires_grad=True)
    Judge(JudgeConfig("attention", 8)).probabilities(video)[:, 3].sum().backward()
    assert video.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["judge", "judge_reward"])
def test_the_shipped_judges_read_rendered_clips(name):
    file = WEIGHTS / f"{name}.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    judge, about = common.load_model(file, Judge)
    clips = [Clip.make(shapes.HELD_OUT + 1, i) for i in range(48)]
    truth = torch.tensor([c.truth() for c in clips])
    right = (judge.read(shapes.render_batch(clips)) == truth)[truth >= 0].float().mean()
    assert right > 0.9, about["results"]
