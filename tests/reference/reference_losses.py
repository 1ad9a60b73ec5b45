"""Slow twins of the losses and baselines, in loops over tokens and views, from section 1 of the project's design.

Sources: normalised-voxel targets, MAE (arXiv 2111.06377, eq. in section 3); InfoNCE (arXiv 1807.03748, eq. 4); MiM
(arXiv 2404.15580). Everything works on float64 torch scalars, so gradients can flow.
"""

import math

import torch

EPS = 1e-6


def normalized(values):
    """(P,) voxels of a token, minus their mean, over sqrt(unbiased variance + 1e-6)."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    return [(v - mean) / (variance + EPS) ** 0.5 for v in values]


def reconstruction(predictions, tokens, is_target):
    """Mean squared error over target tokens; nested sequences [view][token][voxel], [view][token]. No target: 0."""
    total, count = 0.0, 0
    for prediction, token, target in zip(predictions, tokens, is_target, strict=True):
        for m, counts in enumerate(target):
            if not counts:
                continue
            wanted = normalized([v.double() for v in token[m]])
            errors = [(a.double() - b) ** 2 for a, b in zip(prediction[m], wanted, strict=True)]
            total = total + sum(errors) / len(errors)
            count += 1
    return total / count if count else torch.zeros(())


def voxel_error(predictions, tokens, is_target, widths):
    """Sum over targets of the mean squared error of voxels, in window widths; mean and deviation are put back."""
    total = 0.0
    for n in range(len(tokens)):
        for m in range(len(tokens[n])):
            if not is_target[n][m]:
                continue
            voxels = [float(v) for v in tokens[n][m]]
            mean = sum(voxels) / len(voxels)
            deviation = (sum((v - mean) ** 2 for v in voxels) / (len(voxels) - 1) + 1e-6) ** 0.5
            squares = []
            for i, voxel in enumerate(voxels):
                made = float(predictions[n][m][i]) * deviation + mean
                squares.append(((made - voxel) / widths[i % len(widths)]) ** 2)
            total += sum(squares) / len(squares)
    return total


def is_flat(values, thresholds):
    """A token is air if every channel's standard deviation is below that channel's threshold; voxels channel last."""
    n_channels = len(thresholds)
    for c in range(n_channels):
        channel = [float(v) for v in values[c::n_channels]]
        mean = sum(channel) / len(channel)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in channel) / (len(channel) - 1))
        if deviation >= thresholds[c]:
            return False
    return True


def cosine(a, b):
    dot = sum(x.double() * y.double() for x, y in zip(a, b, strict=True))
    length = [sum(x.double() ** 2 for x in vector) ** 0.5 for vector in (a, b)]
    return dot / (length[0] * length[1])


def infonce(children, parents, own_place, weights, temperature):
    """Cross-entropy of each child's own place against all places of all parents, and how often it is the nearest."""
    loss, hits, total = 0.0, 0.0, 0.0
    for child, own, weight in zip(children, own_place, weights, strict=True):
        if not weight:
            continue
        logits = [cosine(child, parent) / temperature for parent in parents]
        others = sum(torch.exp(logit) for logit in logits)
        loss = loss - weight * torch.log(torch.exp(logits[own]) / others)
        hits += weight * float(all(logits[own] >= logit for logit in logits))
        total += weight
    return (loss / total, hits / total) if total else (torch.zeros(()), 0.0)


def cosine_alignment(children, parents, own_place, weights):
    """2 − 2·cosine of each child and its own place."""
    loss, total = 0.0, 0.0
    for child, own, weight in zip(children, own_place, weights, strict=True):
        if weight:
            loss = loss + weight * (2 - 2 * cosine(child, parents[own]))
            total += weight
    return loss / total if total else torch.zeros(())


def place_features(features, regions):
    """[mean feature of every place of every view]: features[view][token] are vectors, regions lists token numbers."""
    means = []
    for tokens in features:
        for region in regions:
            means.append(sum(tokens[t] for t in region) / len(region))
    return means


def infill(image, token_size, keep, token):
    """Voxels of one masked token from its nearest visible tokens (C order, channel last).

    Nearest: Euclidean distance of token centres in voxels of the view; all tokens at that distance are averaged. Each
    voxel takes the value of the voxel of the visible token that is nearest to it.
    """
    grid = [image.shape[1 + a] // token_size[a] for a in range(3)]

    def position(number):
        return number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2]

    def distance(number):
        return sum(((position(number)[a] - position(token)[a]) * token_size[a]) ** 2 for a in range(3))

    nearest = [k for k in keep if distance(k) == min(distance(other) for other in keep)]
    values = []
    for i in range(token_size[0]):
        for j in range(token_size[1]):
            for k in range(token_size[2]):
                at = [position(token)[a] * token_size[a] + step for a, step in enumerate((i, j, k))]
                for c in range(image.shape[0]):
                    found = []
                    for visible in nearest:
                        best = []
                        for a in range(3):
                            first = position(visible)[a] * token_size[a]
                            inside = range(first, first + token_size[a])
                            best.append(min(inside, key=lambda voxel, a=a: abs(voxel - at[a])))
                        found.append(float(image[c, best[0], best[1], best[2]]))
                    values.append(sum(found) / len(found))
    return values
