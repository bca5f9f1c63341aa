"""Reading and comparing plans: nothing runs encrypted here, and no weight is needed to follow.

python examples/plans.py
"""

import networkx as nx
import torch

import tacit
from tacit import networks
from tacit.compare import compare_plans, comparison_text
from tacit.ir.view.leakage import leakage


def main() -> None:
    torch.manual_seed(0)
    model, x = networks.NetworkA().eval(), torch.rand(8, 1, 28, 28)
    plans = {
        protocol: tacit.compile(model, x, protocol=protocol, reveal="argmax", input_range=(0, 1), name="a").plan
        for protocol in ("fused", "securenn")
    }
    plan = plans["fused"]
    print(plan)

    print("A plan is text, and the text is the plan:", tacit.Plan.parse(str(plan)) == plan, plan.digest[:16])

    print("\nLayer by layer, for a batch of 100:")
    for row in plan.layers(batch=100):  # or pandas.DataFrame(plan.layers(batch=100))
        if row["rounds"]:
            when = f"rounds {row['start']:>2} to {row['end']:>2}"
            print(f"  {row['layer']:<5} {row['ops']:<14} {when}  {row['online_bytes']:>9,} bytes")

    print("\nThe longest chain of rounds:")
    graph = plan.to_networkx()
    chain = nx.dag_longest_path(graph, weight=None)
    print("  " + " -> ".join(f"%{name}" for name in chain if graph.nodes[name]["rounds"]))

    print("\nWhat the dealer has to deal for one image:")
    for need in plan.requirements()[:4]:
        print(f"  %{need.node} {need.kind}: {need.count} of {need.item.element.name}")

    print("\nWhat P2 sees, and what the plan discloses:")
    statement = leakage(plan)
    for line in (*(seen.what for seen in statement.views[2].statements), *statement.disclosed[:4]):
        print(f"  - {line}")

    print("\nWhat the textbook protocol costs instead:")
    print(comparison_text(compare_plans(plan, plans["securenn"])))


if __name__ == "__main__":
    main()
