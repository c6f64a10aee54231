from .clicks import draw_clicks as draw_clicks
from .clicks import evaluate as evaluate
from .metrics import iou as iou
