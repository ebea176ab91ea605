"""Networks as distillers see them: made by name, or from one's own module."""

# These register the 32x32 nets and the small transformers with timm.
from kdzoo.models import cifar_mobile, cifar_resnet, cifar_vgg, small_transformers, wrn  # noqa: F401
from kdzoo.models.adapt import unfuse_attention
from kdzoo.models.by_name import check_name, create, pretrained_classes
from kdzoo.models.cast import cast_weights
from kdzoo.models.convolutions import learn_on_cpu
from kdzoo.models.copies import fault_of_copies
from kdzoo.models.ensemble import Ensemble, combined, learned_shares
from kdzoo.models.fold import fold_norms
from kdzoo.models.frozen_copy import frozen
from kdzoo.models.given import classes_in, load_given, written_facts
from kdzoo.models.names import short_names
from kdzoo.models.network import Network, channels_last, describe, wrap
from kdzoo.models.shapes import output_of, shapes_of
from kdzoo.models.student import Student
from kdzoo.models.weights import load_weights, save_weights
from kdzoo.models.winograd import use_winograd

__all__ = [
    "Ensemble",
    "Network",
    "Student",
    "cast_weights",
    "channels_last",
    "check_name",
    "classes_in",
    "combined",
    "create",
    "describe",
    "fault_of_copies",
    "fold_norms",
    "frozen",
    "learn_on_cpu",
    "learned_shares",
    "load_given",
    "load_weights",
    "output_of",
    "pretrained_classes",
    "save_weights",
    "shapes_of",
    "short_names",
    "unfuse_attention",
    "use_winograd",
    "wrap",
    "written_facts",
]
