"""Write a network as a folder that timm loads without kdzoo, where timm can say all that the network is."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models import model_entrypoint, save_for_hf
from torch import nn

from kdzoo.errors import UserError, is_shortage, told
from kdzoo.models.network import Network
from kdzoo.models.weights import save_weights
from kdzoo.process_state import only_errors_of


class CannotSay(UserError):
    """Why timm cannot make a network by what its configuration says."""


def write_timm(network: nn.Module, folder: Path, classes: Sequence[str], test_crop: float) -> None:
    """Write ``config.json``, weights and classes, and check that what timm makes of them computes the same.

    Raises:
        CannotSay: the network is none of timm's, or was adapted in a way that its configuration cannot hold. What was
            written until then stays.
    """
    if not isinstance(network, Network):
        raise CannotSay("it consists of more than a network of timm's")
    name = getattr(network.body, "pretrained_cfg", {}).get("architecture", "")
    if not timm.is_model(name) or not model_entrypoint(name).__module__.startswith("timm."):
        raise CannotSay(f"{network.name} is no network of timm's")
    (folder / "classes.txt").write_text("".join(f"{each}\n" for each in classes), encoding="utf-8")
    facts, side = network.facts(), network.image_size
    mean, std = (values * 3 if len(values) == 1 else values for values in (facts["mean"], facts["std"]))
    shown = {"input_size": (3, side, side), "mean": mean, "std": std}
    shown |= {"crop_pct": test_crop, "crop_mode": "center", "interpolation": "bilinear"}
    try:
        with only_errors_of("timm"):  # what it warns of is checked here
            save_for_hf(
                network.body,
                str(folder),
                model_config={"label_names": list(classes)},
                safe_serialization=True,
                data_config=shown,
            )
            save_weights(network, folder / "model.safetensors")  # with what a network must be given to read them
            again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
        normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.inference_mode():
            theirs, output = again(normalised), network(images)
            ours = output.logits if network.has_classifier else output.embedding
            same = theirs.shape == ours.shape and (theirs - ours).abs().max() <= 1e-3 * ours.abs().max()
    except OSError:
        raise
    except Exception as error:  # of timm's constructors, on keywords and shapes that do not fit
        if is_shortage(error):
            raise
        why = "; ".join(facts["adapted"]) or told(error)
        raise CannotSay(f"timm's configuration cannot say how {network.name} was adapted ({why})") from error
    if not same:
        why = "; ".join(facts["adapted"]) or "its outputs differ"
        raise CannotSay(f"timm's configuration cannot say how {network.name} was adapted ({why})")
