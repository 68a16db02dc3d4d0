"""A model as lmms-eval asks it: `lmms_eval --model idefics_sft --model_args pretrained=RUN`.

A request is one turn of the user in the format of training: its images, then its text. Answers are greedy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Message, Sample
from sft.evaluation.generate_answers import generate_answers
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import TOO_LONG, Query
from sft.models.loaded_model import Loaded, load_for_inference
from sft.runs.names import find_model

CHUNK = 256  # requests whose images are in memory at a time


def manifest() -> ModelManifest:
    """Return what the entry point gives to lmms-eval."""
    return ModelManifest("idefics_sft", simple_class_path=f"{__name__}.IdeficsSFT")


class IdeficsSFT(lmms):  # type: ignore[misc]  # lmms-eval is not typed
    """A model of this toolkit."""

    def __init__(self, pretrained: str = "", loaded: Loaded | None = None, **_: Any) -> None:
        super().__init__()
        self.loaded = loaded or load_for_inference(find_model(pretrained))
        self.images: dict[int, str] = {}  # item of the task that is asked last -> hash of its images

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, up to the first of its stops. Raise UserError for one to be sampled."""
        alike = groupby(enumerate(requests), lambda own: (own[0] // CHUNK, _settings(own[1])))
        return [text for (_, how), own in alike for text in self._written([one for _, one in own], *how)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return the mean loss of each continuation, and whether the model would write it. lmms-eval's models return a
        loss here, and its tasks of multiple choice take the lowest. It makes text of a bare pair (0.7.3)."""
        return [GenerationResult(self._loss(request)) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise UserError: a task of several rounds is not asked."""
        raise UserError(f"{requests[0].args[-2]}: has several rounds; expected a task of one question an item")

    def _loss(self, request: Any) -> tuple[float, bool]:
        end = str(request.args[1](self._doc(request)) if callable(request.args[1]) else request.args[1])
        asked, own = Query(self._sample(request), (end,)), self.loaded
        ((score,),) = score_answers(own.model, own.template, [asked], autocast=own.autocast)  # type: ignore[misc]
        return -score.log_prob / score.num_tokens, self._written([request], score.num_tokens) == [end.strip()]

    def _written(self, requests: Sequence[Any], length: int, beams: int = 1, stops: Sequence[str] = ()) -> list[str]:
        own, samples = self.loaded, [self._sample(request) for request in requests]
        how: dict[str, Any] = {"max_positions": own.max_positions, "autocast": own.autocast, "num_beams": beams}
        texts = generate_answers(own.model, own.template, samples, max_new_tokens=length, **how)
        if None in texts:
            raise UserError(f"{samples[texts.index(None)].key}: {TOO_LONG}")
        return [min((str(text).split(stop)[0] for stop in stops), key=len, default=str(text)) for text in texts]

    def _doc(self, request: Any) -> Any:
        item, task, split = request.args[-3:]
        return self.task_dict[task][split][item]

    def _sample(self, request: Any) -> Sample:
        item, task, _ = request.args[-3:]
        shown = request.args[2](self._doc(request)) or []
        if other := [one for one in shown if not isinstance(one, Image.Image)]:
            raise UserError(f"{task}: item {item} shows {str(other[0])[:80]!r}, a video or sound; expected images")
        encoded = [_png(image) for image in shown]
        self.images[item] = hashlib.sha256(b"".join(encoded)).hexdigest() if encoded else ""
        content = (*(ImageRef(source=one) for one in encoded), request.args[0])
        return Sample(key=f"{task}/{item}", messages=(Message(role="user", content=content),))


def _settings(request: Any) -> tuple[int, int, tuple[str, ...]]:
    """Return new tokens, beams and stops of a request; a temperature of 0 says the same as none."""
    given = request.args[1]
    if given.get("do_sample") and given.get("temperature", 1):
        raise UserError(f"{request.args[-2]}: is sampled by a temperature; expected 0, since answers are greedy")
    stops = given.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
    return given.get("max_new_tokens") or 128, given.get("num_beams") or 1, stops


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()
