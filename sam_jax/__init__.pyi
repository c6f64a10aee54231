from . import automatic as automatic
from . import checkpoints as checkpoints
from . import evaluation as evaluation
from . import export as export
from . import ops as ops
from . import training as training
from . import visualize as visualize
from .automatic import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
from .automatic import pipeline as pipeline
from .checkpoints import from_pretrained as from_pretrained
from .checkpoints import save_pretrained as save_pretrained
from .config import SamConfig as SamConfig
from .errors import CheckpointError as CheckpointError
from .errors import MissingExtra as MissingExtra
from .image import load_image as load_image
from .models.image_encoder import ImageEncoder as ImageEncoder
from .models.preprocessing import preprocess as preprocess
from .models.sam import Decoded as Decoded
from .models.sam import Sam as Sam
from .ops.prompts import join_prompts as join_prompts
from .predictor import MaskPrediction as MaskPrediction
from .predictor import SamPredictor as SamPredictor
from .processing import SamProcessor as SamProcessor
from .training.rules import combine as combine
from .training.rules import partition as partition

__version__: str
