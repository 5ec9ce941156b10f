"""`train_features.py`: UPLiFT, LiFT, and the published upsamplers that are trained by reconstruction."""

from uplift_diffusers.evaluation.predictive.peers import JAFAR, AnyUp
from uplift_diffusers.training import features


def main(arguments: list[str] | None = None) -> int:
    """`uplift_diffusers.training.features.main` with jafar and anyup as further values of `--method`."""
    features.add_peer("jafar", lambda space: JAFAR(space.channels))
    features.add_peer("anyup", lambda space: AnyUp())
    return features.main(arguments)
