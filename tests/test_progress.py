"""evals/progress.py: what a run says of its student beside the teacher."""

from types import SimpleNamespace

import pytest
import torch

from evals import progress


def test_a_gain_is_the_students_and_a_fall_of_the_distance(monkeypatch):
    """A student that is right more often and whose features lie nearer to those of rendered clips."""
    n = progress.COMPARED
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    rendered, places = noise, {"teacher": 2.0, "student": 0.5}

    def draw(nets, who, prompts, seed, steps, batch):
        """A "video" holds its features and whether it is right."""
        first = seed - 1
        right = torch.full((len(prompts), 1), 0.75 if who == "student" else 0.5)
        return torch.cat([rendered[first : first + len(prompts)] + places[who], right], 1)

    seen = iter(range(0, n, progress.READ_AT_ONCE))

    def render(clips):
        first = next(seen)
        return torch.cat([rendered[first : first + len(clips)], torch.zeros(len(clips), 1)], 1)

    monkeypatch.setattr(progress, "draw_videos", draw)
    monkeypatch.setattr(progress, "render_batch", render)
    judge = SimpleNamespace(features=lambda video: video[:, :4], score=lambda video, prompts: video[:, 4])
    nets = SimpleNamespace(judge=judge, device="cpu", prompts=[str(i) for i in range(n)])
    teacher, student, gain = progress.compare_with_teacher(nets, [2], 8)
    assert [row["label"] for row in (teacher, student, gain)] == ["teacher", "student", "gain"]
    assert (teacher["named"]["mean"], student["named"]["mean"], gain["named"]["mean"]) == (0.5, 0.75, 0.25)
    # between clouds of one shape the distance is that of their means, squared: 4 numbers of 2, or of 0.5
    assert teacher["frechet"]["mean"] == pytest.approx(16, rel=1e-3)
    assert student["frechet"]["mean"] == pytest.approx(1, rel=1e-3)
    assert gain["frechet"]["mean"] == pytest.approx(15, rel=1e-3) and gain["steps"] == 2
    words = progress.in_words(teacher, student, gain)
    assert "the student has 75.0% right, the teacher 50.0% (+" in words and "nearer by +" in words
