"""How much of the Dice is lost to islands: predictions of the few-shot protocol, and the largest piece of each label.

    python benchmarks/islands.py -d 501 OUTPUT…

OUTPUT: folders of the protocol (-o). A short training sees little of what is far from the organs, and a few islands
there make seeds differ more than the organs themselves do. What nnU-Net's postprocessing can do for them is shown here,
for every arm alike; the protocol's own figures are without it.
"""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

from nnunet_mim.nnunet.datasets import dataset_name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("outputs", nargs="+", type=Path, metavar="OUTPUT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    references = Path(os.environ["nnUNet_preprocessed"], dataset_name(options.d), "gt_segmentations")
    rows = [row for output in options.outputs for row in rows_of(output, references)]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print("| output | labels | arm | seeds | Dice % | of the largest pieces | islands % |")
    print("|---" * 7 + "|")
    for row in rows:
        spread = [f"{100 * np.mean(row[name]):.2f} ± {100 * np.std(row[name], ddof=1):.2f}" if len(row[name]) > 1
                  else f"{100 * row[name][0]:.2f}" for name in ("dice", "largest")]  # fmt: skip
        islands = 100 * np.mean(row["islands"])
        what = [str(row[name]) for name in ("output", "labels", "arm", "seeds")]
        print(f"| {' | '.join([*what, *spread])} | {islands:.1f} |")


def rows_of(output, references):
    """One row for each number of labels and arm: lists over seeds."""
    cells = defaultdict(list)
    cell = f"cells/{references.parent.name}/*/labels_*/seed_*/*"
    for summary in sorted(output.glob(f"{cell}/**/validation/summary.json")):
        labels, _, arm = summary.relative_to(output).parts[3:6]
        cells[labels.removeprefix("labels_"), arm].append(figures(summary, references))
    return [
        {"output": output.name, "labels": labels, "arm": arm, "seeds": len(found),
         **{name: [cell[name] for cell in found] for name in found[0]}}
        for (labels, arm), found in cells.items()
    ]  # fmt: skip


def figures(summary, references):
    """Mean over labels of the mean over cases: Dice, Dice of the largest pieces, islands as a share of the organ."""
    cases = load_summary_json(str(summary))["metric_per_case"]
    labels = list(cases[0]["metrics"])
    found = np.array([case_figures(case["prediction_file"], labels, summary.parent, references) for case in cases])
    dice, largest, islands = (float(value) for value in np.nanmean(found, axis=0).mean(axis=0))
    return {"dice": dice, "largest": largest, "islands": islands}


def case_figures(name, labels, folder, references):
    """(labels, 3); NaN where a case has none of a label."""
    predicted, truth = (SimpleITKIO().read_seg(str(at / Path(name).name))[0] for at in (folder, references))
    rows = []
    for label in labels:
        mask, organ = predicted == label, truth == label
        if not organ.any():
            rows.append([np.nan] * 3)
            continue
        kept = remove_all_but_largest_component_from_segmentation(predicted, label) == label
        rows.append([dice(mask, organ), dice(kept, organ), (mask & ~kept & ~organ).sum() / organ.sum()])
    return rows


def dice(mask, organ):
    return 2 * (mask & organ).sum() / (mask.sum() + organ.sum())


if __name__ == "__main__":
    main()
