"""The words that options take, each with one meaning everywhere."""

from typing import Literal


Polarity = Literal["undesirable", "desirable"]
Temporal = Literal["none", "mean", "ema"]
Evaluation = Literal["lazy", "eager", "auto"]
Way = Literal["filter", "rollback", "soft", "end"]  # in which a filter uses a head
Selection = Literal["first", "soft"]
Fallback = Literal["argmin", "args", "abstain"]
VectorMode = Literal["broadcast", "last_token"]
HeadMethod = Literal["filter", "abstain"]
DirectionMethod = Literal["mean_difference", "pca", "logistic"]
Pooling = Literal["last", "mean"]
PromiseMode = Literal["marginal", "pac", "uniform", "martingale", "selective"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TargetOfAll = Literal["response", "prefix", "hazard", "risk"]  # of every token
Target = Literal[TargetOfAll, "onset"]
Loss = Literal["bce", "focal"]
