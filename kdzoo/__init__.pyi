from . import data as data
from . import losses as losses
from . import models as models
from . import registry as registry
from . import spectral as spectral
from .checks import CheckResult as CheckResult
from .checks import check as check
from .distillation import Distillation as Distillation
from .distillation import distill as distill
from .distiller import Batch as Batch
from .distiller import DataSpec as DataSpec
from .distiller import Distiller as Distiller
from .distiller import Fidelity as Fidelity
from .distiller import Needs as Needs
from .errors import UserError as UserError
from .experiments.bench import Report as Report
from .experiments.bench import bench as bench
from .experiments.run import run as run
from .image_set import ImageSet as ImageSet
from .outputs import NetworkView as NetworkView
from .outputs import Output as Output
from .outputs import Show as Show
from .results.table import table as table
from .store.folder import Result as Result

__version__: str
