"""A little of the fuzzing, in the suite: Hypothesis and the mutator play each scene."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.messages import WIRE_VERSION, encode
from tests.common.test_messages import messages
from tests.fuzz.flood import run_flood
from tests.fuzz.mutate import Mutator
from tests.fuzz.scenes import SCENES, Scene, pack, seeds, unpack
from tests.guest.arrange import hello_of

MUTATED = 3000  # messages a scene
_flags = st.integers(0, 3)
_damaged = st.builds(lambda seed: Mutator(seed, hello_of()).message(), st.integers(0, 1 << 32))
_plays = st.lists(st.tuples(_flags, messages.map(encode) | _damaged | st.binary(max_size=100)), max_size=8).map(pack)


@pytest.fixture(params=sorted(SCENES))
def scene(request: pytest.FixtureRequest, lab_name: str) -> Iterator[Scene]:
    opened = SCENES[request.param](lab_name)
    yield opened
    opened.close()


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=8))
def test_a_play_has_the_messages_that_were_packed(packed: list[tuple[int, bytes]]) -> None:
    assert list(unpack(pack(packed))) == packed


def test_the_seeds_of_the_fuzzer_play(scene: Scene) -> None:
    for play in seeds():
        scene.play(play)
    assert scene.messages > 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_plays)
def test_s5_s11_whatever_arrives_nobody_else_notices(scene: Scene, play: bytes) -> None:
    scene.play(play)


def test_s5_s11_thousands_of_wrong_messages(scene: Scene) -> None:
    mutator = Mutator(WIRE_VERSION, hello_of())
    for _play in range(MUTATED // 4):
        scene.play(pack((number & 1, mutator.message()) for number in range(4)))
    assert scene.messages > MUTATED // 2  # those that are too long for the queue cannot arrive


def test_s11_a_flood_leaves_a_host_process_as_large_as_it_was(lab_name: str) -> None:
    outcome = run_flood(lab_name, messages=6000, seed=1)
    assert outcome.sound, outcome
    assert outcome.messages == 6000
    assert outcome.malformed > 3000
    assert outcome.neighbour_reports > 20
