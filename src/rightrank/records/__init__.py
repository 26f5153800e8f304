"""The records that the parts of `rightrank` exchange: frozen, typed, one JSON object each.

An `Arm` is a training that a strategy requests. A `Trial` is one run of an arm, with the identity that the run gives it.
A trial ends in exactly one of `TrialFinished`, `TrialCollapsed`, `TrialDiverged` or `TrialFailed`. `decide` makes a `Decision`
of finished trials. The records of `plan` and of the probe are in `records.plan` and `records.probe`.
"""

from rightrank.records.adapter import AdapterAnswer, AdapterCandidate, AdapterOrigin, HandedOver, TrainingRankEstimate
from rightrank.records.base import SCHEMA_VERSION, MetricName, Record, SplitName, content_hash
from rightrank.records.decision import (
    Basis,
    CurveFit,
    Decision,
    FittedPoint,
    HorizonNote,
    MetricAnswer,
    NextRun,
    RankEvidence,
    Result,
    ResultsTable,
    StaircaseStep,
    SweepRow,
    Verdict,
)
from rightrank.records.guard import GuardAnswer, GuardCandidate, GuardEvaluated, GuardFile
from rightrank.records.run import (
    JOURNAL_RECORD,
    AdapterRecorded,
    Certified,
    DataSummary,
    DecisionRecorded,
    JournalRecord,
    Preparing,
    RunContinued,
    RunEvent,
    RunStarted,
    Sample,
    SplitSummary,
    StepDone,
    TestEvaluated,
)
from rightrank.records.trials import (
    OUTCOMES,
    Arm,
    ArmFields,
    EvalPoint,
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialResult,
    TrialStarted,
    TrialTask,
    trial_id,
)
