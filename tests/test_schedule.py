"""Scale schedules: arithmetic, reading and refusing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.schedule import SCHEDULES, ScaleSchedule


@st.composite
def schedules(draw):
    steps = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
    h, w, sides = 1, 1, []
    for dh, dw in steps:
        h, w = h + dh, w + dw
        sides.append((h, w))
    return ScaleSchedule(tuple(sides))


@given(schedules())
def test_offsets_and_levels_agree(schedule):
    assert schedule.total == sum(h * w for h, w in schedule.sides) == len(schedule.level_ids)
    for k, (begin, end) in enumerate(zip(schedule.begins, schedule.ends)):
        assert set(schedule.level_ids[begin:end]) == {k}
        assert end - begin == schedule.lengths[k]


@given(schedules())
def test_text_and_spec_read_back(schedule):
    assert ScaleSchedule.of(schedule.text) == ScaleSchedule.of(schedule.spec) == schedule


def test_published_token_counts():
    assert SCHEDULES["var256"].ends == (1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
    assert SCHEDULES["var512"].total == 2240
    assert SCHEDULES["var1024"].total == 9451
    assert SCHEDULES["scenes64"].total == 155


@pytest.mark.parametrize("spec", ["", "1,x", "4,2", "0,1", [], [[1, 2, 3]], "1x2x3", None, 3.5, [1.5]])
def test_unreadable_schedules_are_refused(spec):
    with pytest.raises(ValueError, match="schedule"):
        ScaleSchedule.of(spec)


def test_scales_of_the_same_sides_have_names_of_their_own():
    assert ScaleSchedule.of("1,2,2,2x3,4").names == ("1x1", "2x2", "2x2-2", "2x3", "4x4")
