"""Compression policies, defined once, used by simulate and by infer alike."""

from kvtool.policies.base import LayerView, Method, Policy
from kvtool.policies.budget import Budget
from kvtool.policies.names import study_name
from kvtool.policies.registry import method_class, method_classes
from kvtool.policies.select import kept_counts, kept_positions, refuse_impossible, select
from kvtool.policies.text import expand_policies, method_key, parse_policy, policy_from_dict, policy_to_dict

__all__ = [
    "Budget",
    "LayerView",
    "Method",
    "Policy",
    "expand_policies",
    "kept_counts",
    "kept_positions",
    "method_class",
    "method_classes",
    "method_key",
    "parse_policy",
    "policy_from_dict",
    "policy_to_dict",
    "refuse_impossible",
    "select",
    "study_name",
]
