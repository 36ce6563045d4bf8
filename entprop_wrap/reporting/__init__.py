"""Results for people: one HTML page (:func:`report`), and a model card for the Hub (:func:`model_card`)."""

try:
    import huggingface_hub as _huggingface_hub  # noqa: F401
    import jinja2 as _jinja2  # noqa: F401
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'Reports and model cards need {error.name}, which is missing: pip install "entprop-wrap[report]".',
        name=error.name,
    ) from error

from entprop_wrap.reporting.html_report import report
from entprop_wrap.reporting.model_card import model_card

__all__ = ["model_card", "report"]
