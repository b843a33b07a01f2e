"""What captions say of the prompts behind a picture of a stage, from the files of its folder."""

from __future__ import annotations

import json
from pathlib import Path

from kvtool.analysis.study import StudyData
from kvtool.analysis.study_counts import behind, study_words


def test_prompts_behind_a_picture(tmp_path: Path) -> None:
    assert behind("gaps", tmp_path, "") == ""
    (tmp_path / "gaps.md").write_text("# Gaps to the oracle: tiny, niah:depths=6, 12 prompts, compressed at the prompt\n")
    (tmp_path / "compensation.json").write_text(json.dumps({"prompts": 18}))
    (tmp_path / "auto.yaml").write_text("by: harm\nprompts:\n  searched: 9\n  held_out: 7\n")
    assert "Means over 12 prompts" in behind("gaps", tmp_path, "")
    assert "Means over 18 prompts" in behind("causes", tmp_path, "")
    said = behind("search", tmp_path, "")
    assert "mean predicted harm over the 9 prompts" in said
    assert "judged on 7 others" in said
    assert " 30 pairs" in behind("heads_reliability", tmp_path, "heads,n\na,6\nb,24\n")


def test_pictures_name_model_and_policies_as_the_study_does() -> None:
    policy = "streaming:budget=520,sink=8"
    data = StudyData(
        name="s",
        scale="small",
        about="",
        places=(),
        predicted=(),
        nodes=[],
        rows=[{"model": "embedded", "policy": policy, "label": "streaming_8_512"}],
        provenance={"runs": {"infer embedded": {"config": {"model": "tiny"}}}},
    )
    rows = f'policy,source\n"{policy}",own\n'
    svg = "<text>Gaps: tiny, niah</text><text>streaming:budget=520,sink=8 (a text)</text><g id='tiny, x'/>"
    drawn = study_words(svg, "endless", "endless embedded", data, rows)
    assert drawn == "<text>Gaps: embedded, niah</text><text>streaming_8_512 (a text)</text><g id='tiny, x'/>"
