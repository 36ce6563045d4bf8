"""Results for people: one HTML page (:func:`report`), and a section of a model card (:func:`model_card`)."""

from entprop_wrap.robustness.reporting.card import model_card
from entprop_wrap.robustness.reporting.page import report

__all__ = ["model_card", "report"]
