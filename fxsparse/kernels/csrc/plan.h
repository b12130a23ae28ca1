// What a product makes of a pattern before it begins, remembered for as long as the pattern lives: for a single image it
// takes as long as a good part of the product.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fxsparse {

// Where each entry of a pattern reads, counted from where its tile begins, in 16 bits if that is enough: the weights of a
// network do not stay in any cache from one image to the next. And where tiles end in each row: see `product`.
struct Plan {
  std::vector<uint16_t> narrow;
  std::vector<int32_t> wide;
  std::vector<int32_t> ends;

  Plan(int64_t count, bool is_narrow) : narrow(is_narrow ? count : 0), wide(is_narrow ? 0 : count) {}
};

// Plans by the tensor of a pattern's columns, which is known to be the same by its identity and its version.
class Plans {
 public:
  using Key = std::array<int64_t, 10>;  // all that a plan depends on beside the columns

  static Plans& all() {
    static Plans plans;
    return plans;
  }

  std::shared_ptr<const Plan> find(const at::Tensor& columns, const Key& key) {
    if (columns.is_inference()) return nullptr;  // it has no version
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = plans_.find(columns.unsafeGetTensorImpl());
    if (found == plans_.end() || !found->second.is_of(columns)) return nullptr;
    for (const auto& [known, plan] : found->second.plans)
      if (known == key) return plan;
    return nullptr;
  }

  void put(const at::Tensor& columns, const Key& key, std::shared_ptr<const Plan> plan) {
    if (columns.is_inference()) return;
    const std::lock_guard<std::mutex> guard(mutex_);
    std::erase_if(plans_, [](const auto& item) { return item.second.columns.expired(); });
    Owner& owner = plans_.try_emplace(columns.unsafeGetTensorImpl(), columns).first->second;
    if (!owner.is_of(columns)) owner = Owner(columns);
    constexpr size_t most = 2;  // geometries of one pattern
    if (owner.plans.size() == most) owner.plans.erase(owner.plans.begin());
    owner.plans.emplace_back(key, std::move(plan));
  }

 private:
  struct Owner {
    explicit Owner(const at::Tensor& tensor) : columns(tensor.getIntrusivePtr()), version(tensor._version()) {}
    bool is_of(const at::Tensor& tensor) const { return !columns.expired() && version == tensor._version(); }

    c10::weak_intrusive_ptr<c10::TensorImpl> columns;
    int64_t version;
    std::vector<std::pair<Key, std::shared_ptr<const Plan>>> plans;
  };

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Owner> plans_;
};

}  // namespace fxsparse
