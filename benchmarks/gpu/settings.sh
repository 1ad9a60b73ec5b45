# Settings of few_shot.sh and ablation.sh: every one is a variable. `number` (the dataset) and `others` are the callers' own.
device=${DEVICE:-cuda} preset=${PRESET:-small} fold=${FOLD:-0}
pretraining=${PRETRAINING:---view 64 --iterations 20000 --batch 8 --children 2 2 --scale 1 2 2 --val_every 1000}
labels=${LABELS:-5 10 20 all} seeds=${SEEDS:-3} jobs=${JOBS:-6}
length=${LENGTH:---iterations 1000 --iterations_per_epoch 50 --val_iterations 5}
recipe=${RECIPE:-lr=0.001 layer_decay=1 oversample_foreground=0.33}  # stock nnU-Net's share of patches with foreground
# short trainings, several at a time: compiling would take longer than it saves, and nnU-Net's twelve loading processes for
# each of them are too many
export nnUNet_compile=${nnUNet_compile:-f} nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-2}
tag=${preset}_$(cksum <<< "$others $pretraining" | cut -d' ' -f1)  # another pretraining is another run

say() { echo "[$(date +%H:%M:%S)] $*"; }
folder=$(python -c "import sys; from nnunet_mim.nnunet.datasets import dataset_name; print(dataset_name(sys.argv[1]))" "$number")
