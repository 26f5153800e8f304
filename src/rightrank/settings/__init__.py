"""The settings of a selection and of a plan: flat records, validated once. All defaults are here."""

from rightrank.settings.identity import (
    CONTINUABLE,
    NOT_IDENTITY,
    settings_difference,
    settings_of_identity,
    with_identity_of,
)
from rightrank.settings.keywords import PlanKeywords, SelectKeywords
from rightrank.settings.metric_spec import MetricSpec, parse_metric
from rightrank.settings.plan import DEFAULT_PLAN_RANKS, OptimizerName, PlanSettings, make_plan_settings
from rightrank.settings.select import (
    CONSTANT_SCALING_RANK,
    PAIR_MARGIN,
    Goal,
    Scaling,
    SelectSettings,
    make_settings,
)
from rightrank.settings.values import UNITS, AutoDtype, DtypeName, checked, parse_bytes
